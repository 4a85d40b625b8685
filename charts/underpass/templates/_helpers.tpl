{{/*
To be called first in every template: puts profile and platform under the user's values. Values that depend on them have no value in
values.yaml, so whatever is in .Values was said by the user. Calling it again changes nothing.
*/}}
{{- define "underpass.init" -}}
{{- $base := .Files.Get "files/profiles/kubernetes.yaml" | fromYaml -}}
{{- range $file := list (printf "files/profiles/%s.yaml" .Values.profile) (printf "files/platforms/%s.yaml" .Values.platform) -}}
{{- $base = mergeOverwrite $base ($.Files.Get $file | fromYaml) -}}
{{- end -}}
{{- $_ := set . "Values" (mergeOverwrite $base .Values) -}}
{{- include "underpass.check" . -}}
{{- end -}}

{{/* What the schema cannot say. */}}
{{- define "underpass.check" -}}
{{- $v := .Values -}}
{{- if eq $v.issuer.kind "external" -}}
{{- if not $v.issuer.external.address -}}
{{- fail "issuer.external.address is empty with issuer.kind: external; write https://HOST:PORT of the authority" -}}
{{- end -}}
{{- if eq (empty $v.issuer.external.root.configMap) (empty $v.issuer.external.root.secret) -}}
{{- fail "issuer.external.root needs exactly one of configMap and secret: what the authority's certificate is checked with" -}}
{{- end -}}
{{- if not $v.issuer.external.root.key -}}
{{- fail "issuer.external.root.key is empty; write the key that has the PEM roots, such as root-cert.pem" -}}
{{- end -}}
{{- end -}}
{{- if and $v.issuer.revocationLists.configMap (not $v.issuer.revocationLists.key) -}}
{{- fail "issuer.revocationLists.key is empty; write the key of the ConfigMap that has the lists, such as crl.pem" -}}
{{- end -}}
{{- if and (ne $v.ca.root.source "managed") (not $v.ca.root.secretName) -}}
{{- fail (printf "ca.root.secretName is empty with ca.root.source: %s; write the name of the Secret" $v.ca.root.source) -}}
{{- end -}}
{{- if and (eq $v.ca.root.source "managed") $v.ca.root.secretName -}}
{{- fail (printf "ca.root.secretName is %q, but with ca.root.source: managed the Secret is underpass-ca; write source: existing or issuer" $v.ca.root.secretName) -}}
{{- end -}}
{{- if $v.agent.nodeTaint -}}
{{- fail "agent.nodeTaint was taken out: with it every agent had the right to change every Node. Take the line out; what created the node with the taint has to remove the taint, once the node's underpass-agent pod is Ready (docs/upgrade.md, \"Nodes\")" -}}
{{- end -}}
{{- if eq (int $v.agent.ports.metrics) (int $v.agent.ports.health) -}}
{{- fail (printf "agent.ports.metrics and agent.ports.health are both %d; they need a port each" (int $v.agent.ports.health)) -}}
{{- end -}}
{{- end -}}

{{/* Whether the agents' metrics can be reached from outside of the node: "true" or "". */}}
{{- define "underpass.metricsExposed" -}}
{{- if or .Values.monitoring.expose .Values.monitoring.serviceMonitor.enabled -}}true{{- end -}}
{{- end -}}

{{- define "underpass.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* dict root, component */}}
{{- define "underpass.selector" -}}
app.kubernetes.io/name: underpass
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* dict root, component */}}
{{- define "underpass.labels" -}}
{{ include "underpass.selector" . }}
app.kubernetes.io/part-of: underpass
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict root, component, own: the labels of a pod. What the mesh consists of is never in it itself. */}}
{{- define "underpass.podLabels" -}}
{{- $labels := dict "underpass.io/mode" "disabled" "istio.io/dataplane-mode" "none" "sidecar.istio.io/inject" "false" -}}
{{- $given := mergeOverwrite (dict) .root.Values.commonLabels .root.Values.podLabels (.own | default dict) -}}
{{- toYaml (mergeOverwrite $labels $given (include "underpass.selector" . | fromYaml)) -}}
{{- end -}}

{{- define "underpass.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* dict root, file, kind, name: the rules of a Role as the tests of the agent know them. */}}
{{- define "underpass.rules" -}}
{{- range $document := regexSplit "(?m)^---$" (.root.Files.Get .file) -1 -}}
{{- $object := fromYaml $document -}}
{{- if and (eq $object.kind $.kind) (eq $object.metadata.name $.name) -}}
{{- toYaml $object.rules -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* dict root, kind, name, component: what binds a role to the ServiceAccount of the same name, or to `account`. */}}
{{- define "underpass.binding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  name: {{ .name }}
  {{- if eq .kind "Role" }}
  namespace: {{ .root.Release.Namespace }}
  {{- end }}
  labels:
    {{- include "underpass.labels" . | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ .account | default .name }}
    namespace: {{ .root.Release.Namespace }}
{{- end -}}

{{/* What containers without rights of their own are content with. */}}
{{- define "underpass.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "underpass.restrictedPod" -}}
runAsNonRoot: true
{{- if ne .Values.platform "openshift" }}
# No user of the image's: there it is a number that exists nowhere else. OpenShift chooses one itself.
runAsUser: 65532
runAsGroup: 65532
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}
