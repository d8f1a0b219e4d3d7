"""What users write: the models of each kind, and the CustomResourceDefinitions generated from them."""
