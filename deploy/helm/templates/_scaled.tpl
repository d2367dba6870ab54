{{/* What scales a Deployment by one figure. Call with (dict "root" $ "it" … "scaling" … "goal" … "query" … "type" "Pods" or "External"). */}}
{{- define "turret.scaled" -}}
{{- $name := include "turret.name" .it }}
{{- if eq .scaling.kind "hpa" }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  labels:
    {{- include "turret.labels" .it | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicas: {{ max 1 .scaling.min }}
  maxReplicas: {{ .scaling.max }}
  metrics:
    - type: {{ .type }}
      {{ lower .type }}:
        metric: {name: {{ .scaling.metric }}}
        target: {type: AverageValue, averageValue: {{ .goal | quote }}}
  behavior:
    scaleDown: {stabilizationWindowSeconds: 300}
{{- else if eq .scaling.kind "keda" }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ $name }}
  labels:
    {{- include "turret.labels" .it | nindent 4 }}
spec:
  scaleTargetRef: {name: {{ $name }}}
  minReplicaCount: {{ .scaling.min }}
  maxReplicaCount: {{ .scaling.max }}
  cooldownPeriod: 300
  triggers:
    - type: prometheus
      {{- if eq .type "Pods" }}
      metricType: Value  # the wait is the same however many pods there are
      {{- end }}
      metadata:
        serverAddress: {{ .root.Values.prometheus }}
        query: {{ .query | quote }}
        threshold: {{ .goal | quote }}
{{- else if ne .scaling.kind "none" }}
{{- fail (printf "autoscaling.kind is %q: expected none, hpa or keda" .scaling.kind) }}
{{- end }}
{{- end }}
