"""From queries and a store to results: every method, and the one scan that answers it."""
