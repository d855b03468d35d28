"""Eight gunicorn workers, four connections to PostgreSQL: a small Django project.

With a database that you may write to, one command (after ``manage.py migrate``) starts the broker, gunicorn and its workers:

    export PGHOST=127.0.0.1 PGDATABASE=app PGUSER=app PGPASSWORD=secret
    python examples/django_app/manage.py migrate
    mppool run -- gunicorn -c examples/django_app/project/gunicorn.py --chdir examples/django_app project.wsgi

and then, in another terminal:

    $ curl http://127.0.0.1:8000/add/ann/hello
    1
    $ curl http://127.0.0.1:8000/whoami
    backend 4711, worker 4242
    $ mppool status

All that is special here is DATABASES: the ENGINE, and in OPTIONS what the pool is told. ``max_size`` is for all workers together.
"""

import os

DATABASES = {
    "default": {
        "ENGINE": "mppool.integrations.django.postgresql",
        "NAME": os.environ.get("PGDATABASE", "app"),
        "HOST": os.environ.get("PGHOST", "127.0.0.1"),
        "PORT": os.environ.get("PGPORT", "5432"),
        "USER": os.environ.get("PGUSER", "app"),
        "PASSWORD": os.environ.get("PGPASSWORD", ""),
        "CONN_MAX_AGE": float(os.environ.get("CONN_MAX_AGE", "0")),  # 0: a request gives its session back at its end
        "CONN_HEALTH_CHECKS": bool(os.environ.get("CONN_HEALTH_CHECKS")),
        "ATOMIC_REQUESTS": True,
        "OPTIONS": {
            "max_size": int(os.environ.get("DATABASE_CONNECTIONS", "4")),
            "timeout": 10,
            "application_name": "django_app",
        },
    }
}

SECRET_KEY = "an example"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "project.urls"
INSTALLED_APPS = ["notes"]
MIDDLEWARE: list[str] = []
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
