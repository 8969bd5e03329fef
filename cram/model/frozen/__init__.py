"""The frozen base model under the experts: its own forward, how it is known again, how it is saved."""
