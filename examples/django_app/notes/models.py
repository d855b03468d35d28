from django.db import models


class Note(models.Model):
    author = models.CharField(max_length=50)
    text = models.TextField()
    written = models.DateTimeField(auto_now_add=True)
