"""Campaigns: what trains more than once, each time on what the time before left."""
