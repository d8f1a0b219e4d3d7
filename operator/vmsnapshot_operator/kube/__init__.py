"""The API server: requests, our objects, leases, events, and the pure mappings between objects and our own types."""
