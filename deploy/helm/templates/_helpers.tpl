{{/* Labels of an object. Call with (dict "root" $ "part" "server"). */}}
{{- define "turret.labels" -}}
{{ include "turret.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "turret.selector" -}}
app.kubernetes.io/name: turret
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "turret.name" -}}
{{ printf "%s-%s" .root.Release.Name .part | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "turret.url" -}}
{{- $p := .Values.store.postgres -}}
postgresql://{{ $p.user }}@{{ $p.host }}:{{ $p.port }}/{{ $p.database }}?files={{ .Values.store.s3.bucket }}{{ with $p.options }}&{{ . }}{{ end }}
{{- end }}

{{/* A pod of one container. Call with (dict "root" $ "part" … "command" (list …) "more" values "grace" seconds "restart" …). */}}
{{- define "turret.pod" -}}
{{- $v := .root.Values -}}
metadata:
  labels:
    {{- include "turret.labels" . | nindent 4 }}
spec:
  automountServiceAccountToken: false
  restartPolicy: {{ .restart | default "Always" }}
  terminationGracePeriodSeconds: {{ .grace | default 30 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    seccompProfile: {type: RuntimeDefault}
  {{- with .more.nodeSelector }}
  nodeSelector: {{ toJson . }}
  {{- end }}
  {{- with .more.tolerations }}
  tolerations: {{ toJson . }}
  {{- end }}
  {{- if eq .part "server" }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "turret.selector" . | nindent 10 }}
  {{- end }}
  containers:
    - name: {{ .part }}
      image: "{{ $v.image.repository }}:{{ $v.image.tag | default .root.Chart.AppVersion }}"
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args: {{ toJson .command }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      env:
        - {name: TURRET_STORE, value: {{ include "turret.url" .root | quote }}}
        {{- with $v.store.s3.endpoint }}
        - {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
        {{- end }}
        {{- with $v.store.s3.region }}
        - {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
        {{- end }}
      envFrom:
        - secretRef: {name: {{ $v.store.secret }}}
      {{- with .more.resources }}
      resources: {{ toJson . }}
      {{- end }}
      {{- if eq .part "server" }}
      ports:
        - {name: http, containerPort: 8000}
      # The base is loaded before the first answer. A busy pod answers late, and is neither ended nor taken out.
      startupProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 5, timeoutSeconds: 5, failureThreshold: 240}
      readinessProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 5, timeoutSeconds: 5, failureThreshold: 3}
      livenessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 20, timeoutSeconds: 10, failureThreshold: 6}
      lifecycle:
        preStop: {exec: {command: [sleep, "5"]}}  # until no proxy sends new requests
      {{- end }}
      volumeMounts:
        - {name: home, mountPath: /var/lib/turret}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: home
      {{- if $v.cache.claim }}
      persistentVolumeClaim: {claimName: {{ $v.cache.claim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $v.cache.size }}}
      {{- end }}
    - name: tmp
      emptyDir: {}
{{- end }}
