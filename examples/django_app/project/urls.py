from django.urls import path
from notes import views

urlpatterns = [
    path("add/<str:author>/<str:text>", views.add),
    path("notes/<str:author>", views.notes),
    path("fail/<str:author>", views.fail),
    path("sleep/<str:seconds>", views.sleep),
    path("setting", views.setting),
    path("whoami", views.whoami),
    path("stream", views.stream),
    path("awaited", views.awaited),
]
