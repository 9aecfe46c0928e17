"""The dashboard: web pages that show runs, sites and models, in a process that no study depends on."""
