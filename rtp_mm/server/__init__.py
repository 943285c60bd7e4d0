"""The gRPC service, its HTTP companion, and the client."""
