"""One module per way to make a VM stand still. They speak to the hypervisor; never to storage or the API server."""
