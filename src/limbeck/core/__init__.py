"""The words everyone shares: types, protocols, registry, random streams, errors."""
