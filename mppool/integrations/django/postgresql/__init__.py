"""``ENGINE = "mppool.integrations.django.postgresql"``: see base.py."""
