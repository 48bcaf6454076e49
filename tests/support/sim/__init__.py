"""Schedules of the whole engine on the simulated device: generated, run, checked, shrunk and replayed."""
