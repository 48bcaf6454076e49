"""Model families, written once each, and the registry that picks one by architecture."""
