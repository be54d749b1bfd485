"""From a recipe to a report: schema, resolving, planning, running, reporting."""
