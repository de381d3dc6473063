"""The pocket world, its models and the judge: small enough for two CPU cores, with known ground truth."""
