"""Model families: the mixin interface that all of them answer, and one file per family with what differs."""
