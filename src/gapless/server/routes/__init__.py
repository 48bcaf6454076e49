"""The routes, a router in each file."""
