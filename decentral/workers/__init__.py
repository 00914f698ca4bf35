"""The real world: Ray places workers on machines and notices deaths; tensors go from worker to worker over gRPC."""
