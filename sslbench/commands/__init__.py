"""What `sslbench` can do: a module a verb, each called by cli.py."""
