"""Routes: thin. Each module makes one router from the service that it is given."""
