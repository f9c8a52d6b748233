"""What there is to see before training and after it: data as the model reads them, runs, as text and as pages."""
