"""What other tools write and read."""
