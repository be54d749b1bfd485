"""Teachers beyond a model that is read: caches, ensembles, the student itself, servers, writers."""
