"""Process groups of the parallel axes."""
