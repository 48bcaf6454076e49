"""Fixtures that several tests share: real objects, small."""
