"""The dashboard: web pages that read what the server keeps, in a process that no study depends on."""
