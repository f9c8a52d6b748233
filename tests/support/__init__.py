"""What tests share, and the programs that they start; holds no test."""
