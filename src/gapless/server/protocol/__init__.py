"""What goes over the wire: requests as pydantic models with their bounds, answers as msgspec structs."""
