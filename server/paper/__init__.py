"""The protocols of CLIP-SVD's paper over published data sets, in one place and federated, table by table."""
