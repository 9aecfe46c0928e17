{{/* The release's name, short enough for what is put after it. */}}
{{- define "fedsigma.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Labels of a part; called with (dict "root" . "part" "worker"). */}}
{{- define "fedsigma.selector" -}}
app.kubernetes.io/name: fedsigma
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "fedsigma.labels" -}}
{{ include "fedsigma.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* What the restricted profile of Kubernetes' pod security standards asks for, and more. */}}
{{- define "fedsigma.pod" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "fedsigma.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Probes; called with how to ask, such as (dict "grpc" (dict "port" 8001)). A process that starts may take a
while until its other side is there. */}}
{{- define "fedsigma.probes" -}}
startupProbe:
  {{- toYaml . | nindent 2 }}
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  {{- toYaml . | nindent 2 }}
  periodSeconds: 30
  timeoutSeconds: 5
  failureThreshold: 4
readinessProbe:
  {{- toYaml . | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}

{{/* dashboard.yaml. */}}
{{- define "fedsigma.dashboard" -}}
{{- $dashboard := .Values.server.dashboard -}}
listen: 0.0.0.0:8050
{{- if $dashboard.tlsSecret }}
certificate: /etc/fedsigma-tls/tls.crt
key: /etc/fedsigma-tls/tls.key
{{- end }}
access:
  origins: {{ toJson $dashboard.origins }}
  proxies: {{ toJson $dashboard.proxies }}
{{- end }}
