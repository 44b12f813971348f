"""Search: which layers of a network stay real within a budget of operations."""
