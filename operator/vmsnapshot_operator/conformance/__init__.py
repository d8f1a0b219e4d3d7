"""The suite that any storage driver can be run through; it comes with the driver SDK."""
