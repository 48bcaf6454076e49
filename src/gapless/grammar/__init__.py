"""Forms of answers: what a request asks (spec.py), and what makes masks of it, which needs llguidance."""
