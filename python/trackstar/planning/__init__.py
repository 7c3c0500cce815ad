"""What builds and queries need, said before they start."""
