"""Files: safe paths, JSON, arrays, and the agreement of several processes on one folder."""
