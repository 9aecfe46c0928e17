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

{{/* Probes of a gRPC health service. A process that starts may take a while until its other side is there. */}}
{{- define "fedsigma.probes" -}}
startupProbe:
  grpc: {port: {{ . }}}
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  grpc: {port: {{ . }}}
  periodSeconds: 30
  timeoutSeconds: 5
  failureThreshold: 4
readinessProbe:
  grpc: {port: {{ . }}}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}
