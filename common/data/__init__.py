"""Pictures of a site or a simulation: records, few-shot draws, partitions, decoding; sources/ reads them."""
