"""Teachers that are not a model in this process: a cache of what one said."""
