"""What users write and read: the kinds of the API as pydantic models, and their CustomResourceDefinitions.

Not what follows from an object (`plan`), and not how objects reach us (`kube`).
"""
