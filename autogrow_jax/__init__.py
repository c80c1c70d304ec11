"""Neural networks that find their own depth and width while they train."""
