"""In front of vLLM: requests without gates get group and gates from the router."""
