"""File access: safe paths, JSON, arrays, and multi-host coordination."""
