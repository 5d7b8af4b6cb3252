"""What Fleetmind is measured beside: each in an environment of its own, none a dependency of the product."""
