"""What the peers are made of: files, worker processes, sessions."""
