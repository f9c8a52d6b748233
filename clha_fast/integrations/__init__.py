"""What runs inside other people's trainers: a file a host, which imports the host when it is asked for."""
