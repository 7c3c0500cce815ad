"""What the optimizer knew: second moments, from saved states or estimated, and the correction they make."""
