"""Networks for edge devices."""
