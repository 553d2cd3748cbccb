raise ImportError("it needs another numpy")
