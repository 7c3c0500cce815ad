"""The store on disk: building, reading, and changing it, one atomic commit after another."""
