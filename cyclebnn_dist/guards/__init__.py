"""Guards: what watches over a run, how it ends when it cannot go on, and what it then tells whom. Imports nothing by itself."""
